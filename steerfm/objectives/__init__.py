"""How a flow map is learnt: one file a consistency rule, pure functions per sample, and objects that hold options."""

from steerfm.objectives.compositional import Compositional
from steerfm.objectives.eulerian import Eulerian
from steerfm.objectives.flow_matching import FlowMatching
from steerfm.objectives.lagrangian import Lagrangian
from steerfm.objectives.weights import Adaptive, SourceTime, Uniform

__all__ = ["Adaptive", "Compositional", "Eulerian", "FlowMatching", "Lagrangian", "SourceTime", "Uniform"]
