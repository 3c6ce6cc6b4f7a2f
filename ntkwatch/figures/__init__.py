"""Arrays → matplotlib figures: one panel an image, type of 12 points and more, colours safe for colour-blind readers.

Figures carry an Agg canvas and know nothing of pyplot: no window, no global list of figures, no user setting touched.
matplotlib is imported when the first one is drawn.
"""

from __future__ import annotations

from ntkwatch.figures.kernel import kernel_heatmap, spectra
from ntkwatch.figures.runs import metric_curves, named_curves, slopes_together, width_slopes
from ntkwatch.figures.style import rgb, save

__all__ = [
    "kernel_heatmap",
    "metric_curves",
    "named_curves",
    "rgb",
    "save",
    "slopes_together",
    "spectra",
    "width_slopes",
]
