"""How a flow map is learnt: one file a consistency rule, pure functions per sample, and objects that hold options."""

from steerfm.objectives.compositional import Compositional
from steerfm.objectives.consistency import Consistency, Shrinking
from steerfm.objectives.distributional import Adversarial, IntegralKL, Levels, TeacherDenoises
from steerfm.objectives.eulerian import Eulerian
from steerfm.objectives.flow_map_matching import FlowMapMatching
from steerfm.objectives.flow_matching import FlowMatching, Reflow
from steerfm.objectives.lagrangian import Lagrangian
from steerfm.objectives.teachers import Rounds, SelfAverage
from steerfm.objectives.total import Total
from steerfm.objectives.weights import Adaptive, Cauchy, Learnt, PseudoHuber, SourceTime, Uniform

__all__ = [
    "Adaptive",
    "Adversarial",
    "Cauchy",
    "Compositional",
    "Consistency",
    "Eulerian",
    "FlowMapMatching",
    "FlowMatching",
    "IntegralKL",
    "Lagrangian",
    "Learnt",
    "Levels",
    "PseudoHuber",
    "Reflow",
    "Rounds",
    "SelfAverage",
    "Shrinking",
    "SourceTime",
    "TeacherDenoises",
    "Total",
    "Uniform",
]
