"""HTML pages of finished and of going runs, each one file that needs no network and no script.

Every number stands in a <data value="..." data-from="RUN FILE PATH"> element that says where it is from; tests follow
it there.
"""

from cpsc_jax.page.base import Run
from cpsc_jax.page.comparison import comparison_page
from cpsc_jax.page.phases import phases_page
from cpsc_jax.page.run import GRIDS, run_page

__all__ = ["GRIDS", "Run", "comparison_page", "phases_page", "run_page"]
