"""Write one self-contained HTML page about a run or a comparison: `bidfmkd report`.

- `facts`: what the files of a run's folder hold, read without changing anything.
- `charts`, `svg`: charts of these facts, as SVG to stand inside the page.
- `pictures`: recovered images and pictures of the survey, as PNG inside the page.
- `comparison`: what the page of a comparison says.
- `page`, `page.html.j2`: what the page says, and its template.
"""

from bidfmkd_fast.reporting.facts import read_facts
from bidfmkd_fast.reporting.page import write_comparison_page, write_page

__all__ = ["read_facts", "write_comparison_page", "write_page"]
