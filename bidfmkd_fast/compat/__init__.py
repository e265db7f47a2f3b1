"""Offer the gradient estimators of other projects under their names, and boxes for their models.

Code that was written for one of these projects can call its function here instead:

- `estimate_gradient_objective` of DFME (Truong et al., CVPR 2021, arXiv 2011.14779);
- `zoge_backward` of MAZE (Kariyappa et al., CVPR 2021, arXiv 2005.03161);
- `zero_order_loss`, which stands inline in the code of BiDf-MKD (Hu et al., ICML 2023, arXiv
  2305.18413).

By default each gives the gradient of the loss that it returns. With `parity=True` it gives the
authors' own scale, and reproduces the slips that change results; the docstrings name them.
"""

from bidfmkd_fast.compat import bidf_mkd, dfme, maze
from bidfmkd_fast.compat.bidf_mkd import zero_order_loss
from bidfmkd_fast.compat.boxes import (
    from_art,
    from_foolbox,
    from_hugging_face,
    from_keras,
    from_sklearn,
    from_torch,
)
from bidfmkd_fast.compat.dfme import estimate_gradient_objective
from bidfmkd_fast.compat.maze import zoge_backward

__all__ = [
    "bidf_mkd",
    "dfme",
    "estimate_gradient_objective",
    "from_art",
    "from_foolbox",
    "from_hugging_face",
    "from_keras",
    "from_sklearn",
    "from_torch",
    "maze",
    "zero_order_loss",
    "zoge_backward",
]
