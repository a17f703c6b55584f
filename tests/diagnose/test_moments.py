"""Moments against float64 numpy definitions on the models' own passes, and against what training records."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from tests.diagnose import zoo
from tests.diagnose.observed import MODULES, observed
from tests.train.test_probe import MOE, VARIANTS, network
from varprop.corpus import order  # noqa: F401
from varprop.diagnose import Batch, Replay, Session, measure
from varprop.diagnose.limits import Limits
from varprop.diagnose.moments import moments
from varprop.errors import BranchesWarning
from varprop.measure import QUANTILES
from varprop.results import SITES
from varprop.spec import AttentionSpec, FeedForwardSpec, ModelSpec
from varprop.train.probe import DIMENSIONS, probe
