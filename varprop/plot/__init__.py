"""Figures from result Datasets, and from nothing else. Every function returns a matplotlib `Figure` to save or to show.

Theory is a line with its claimed error as a band, simulation is points with 95 % t intervals over networks or a line
with a band, training is lines by step. Colours are told apart by readers who do not see all colours: those of Okabe and
Ito for series, cividis for values, purple and orange for ratios.
"""

from varprop.plot.depth_map import plot_depth_map
from varprop.plot.diagnosis import has_panels, plot_diagnosis
from varprop.plot.heat_map import plot_heat_map
from varprop.plot.profiles import plot_growth, plot_profiles
from varprop.plot.qq import plot_qq
from varprop.plot.ratio import VERDICT_STYLE, plot_ratio
from varprop.plot.training import plot_training

__all__ = [
    "VERDICT_STYLE",
    "has_panels",
    "plot_depth_map",
    "plot_diagnosis",
    "plot_growth",
    "plot_heat_map",
    "plot_profiles",
    "plot_qq",
    "plot_ratio",
    "plot_training",
]
