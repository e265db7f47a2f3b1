"""A pool's APIs as a service of the Open Inference Protocol v2 on loopback, with faults on demand.

The server itself is `bidfmkd_fast.serving.server`, which needs the extra `serve`.
"""

from bidfmkd_fast.serving.behaviour import Behaviour, behaviours_of

__all__ = ["Behaviour", "behaviours_of"]
