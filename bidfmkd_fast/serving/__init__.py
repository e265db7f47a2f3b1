"""Serve a pool's APIs on loopback by the Open Inference Protocol v2, with faults on demand.

The room implements the protocol a second time on purpose and shares no code with the clients in
`black_box/remote`: it is a second reading of the specification, so that a client that misreads it
fails against this server. The server itself is `bidfmkd_fast.serving.server`, which needs the extra
`serve`.
"""

from bidfmkd_fast.serving.behaviour import Behaviour, behaviours_of

__all__ = ["Behaviour", "behaviours_of"]
