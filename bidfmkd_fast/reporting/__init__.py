"""Write one self-contained HTML page about a run: `bidfmkd report`.

- `facts`: what the files of a run's folder hold, read without changing anything.
- `charts`, `svg`: charts of these facts, as SVG to stand inside the page.
- `pictures`: recovered images and pictures of the survey, as PNG inside the page.
- `page`, `page.html.j2`: what the page says, and its template.
"""

from bidfmkd_fast.reporting.facts import read_facts
from bidfmkd_fast.reporting.page import write_page

__all__ = ["read_facts", "write_page"]
