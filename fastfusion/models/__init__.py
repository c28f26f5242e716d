"""The systems of the papers, and a closed form to measure them by."""

from fastfusion.models.base import FusionModel
from fastfusion.models.cofusion import CoFusion
from fastfusion.models.fsrvl import FSRVL
from fastfusion.models.lso import LSO
from fastfusion.models.regression import Regression, RegressionModel

__all__ = ["FSRVL", "LSO", "CoFusion", "FusionModel", "Regression", "RegressionModel"]
