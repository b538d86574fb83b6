"""Measurements along the training trajectories of multi-task models.

Every estimator is a pure function of one checkpoint and supports any pytree and any
task. ``loss(params, batch)`` is a mean over a batch in evaluation mode. It closes over
everything that is not differentiated, such as heads and running averages of batch
normalisation. ``batches`` are arrays ``[n, ...]``, which are processed one at a time.
T is the number of tasks, and C is the number of checkpoints.

- :func:`generalization_gap` compares generalisation at equal training loss.
- :func:`gradient_similarity`, :func:`conflict_matrix`, :func:`gradient_gram` and
  :func:`task_affinity` measure the conflict between tasks.
- :func:`gradient_covariance_trace`, :func:`gradient_noise_scale`, :func:`m_coherence`
  and :func:`stiffness_matrix` measure gradient noise and the coherence of examples.
- :func:`fisher_trace`, :func:`worst_case_sharpness`, :func:`sam_sharpness` and
  :func:`average_sharpness` measure Fisher information and sharpness.
- :func:`hvp`, :func:`ggn_vp`, :func:`hessian_top_eigenvalues`, :func:`hessian_trace`
  and :func:`spectral_density` measure curvature.
- :func:`cka`, :func:`parameter_distance`, :func:`linear_mode_connectivity` and
  :func:`loss_slice` compare runs.
- :class:`Probe` evaluates these measurements during a run or on saved checkpoints.
- :func:`aggregate`, :func:`factor_delta`, :func:`sign_agreement` and
  :func:`rank_correlation` summarise measurements.
"""

from mtljax.trajectory._affinity import task_affinity as task_affinity
from mtljax.trajectory._analysis import Delta as Delta
from mtljax.trajectory._analysis import RankCorrelation as RankCorrelation
from mtljax.trajectory._analysis import SignAgreement as SignAgreement
from mtljax.trajectory._analysis import aggregate as aggregate
from mtljax.trajectory._analysis import check_comparable as check_comparable
from mtljax.trajectory._analysis import factor_delta as factor_delta
from mtljax.trajectory._analysis import percent_change as percent_change
from mtljax.trajectory._analysis import rank_correlation as rank_correlation
from mtljax.trajectory._analysis import sign_agreement as sign_agreement
from mtljax.trajectory._conflict import ConflictMatrix as ConflictMatrix
from mtljax.trajectory._conflict import GradientSimilarity as GradientSimilarity
from mtljax.trajectory._conflict import conflict_matrix as conflict_matrix
from mtljax.trajectory._conflict import gradient_gram as gradient_gram
from mtljax.trajectory._conflict import gradient_similarity as gradient_similarity
from mtljax.trajectory._covariance import GradientCovariance as GradientCovariance
from mtljax.trajectory._covariance import GradientMoments as GradientMoments
from mtljax.trajectory._covariance import PerExample as PerExample
from mtljax.trajectory._covariance import Stiffness as Stiffness
from mtljax.trajectory._covariance import (
    gradient_covariance_trace as gradient_covariance_trace,
)
from mtljax.trajectory._covariance import gradient_moments as gradient_moments
from mtljax.trajectory._covariance import gradient_noise_scale as gradient_noise_scale
from mtljax.trajectory._covariance import m_coherence as m_coherence
from mtljax.trajectory._covariance import stiffness_matrix as stiffness_matrix
from mtljax.trajectory._curvature import Trace as Trace
from mtljax.trajectory._curvature import ggn_vp as ggn_vp
from mtljax.trajectory._curvature import hessian_trace as hessian_trace
from mtljax.trajectory._curvature import hvp as hvp
from mtljax.trajectory._fisher import FisherTrace as FisherTrace
from mtljax.trajectory._fisher import fisher_trace as fisher_trace
from mtljax.trajectory._gap import GeneralizationGap as GeneralizationGap
from mtljax.trajectory._gap import generalization_gap as generalization_gap
from mtljax.trajectory._geometry import LinearPath as LinearPath
from mtljax.trajectory._geometry import displacement_cosine as displacement_cosine
from mtljax.trajectory._geometry import filter_normalized as filter_normalized
from mtljax.trajectory._geometry import (
    linear_mode_connectivity as linear_mode_connectivity,
)
from mtljax.trajectory._geometry import loss_slice as loss_slice
from mtljax.trajectory._geometry import parameter_distance as parameter_distance
from mtljax.trajectory._geometry import random_direction as random_direction
from mtljax.trajectory._probe import Probe as Probe
from mtljax.trajectory._probe import Quantity as Quantity
from mtljax.trajectory._probe import cadence as cadence
from mtljax.trajectory._representation import cka as cka
from mtljax.trajectory._sharpness import Sharpness as Sharpness
from mtljax.trajectory._sharpness import average_sharpness as average_sharpness
from mtljax.trajectory._sharpness import sam_sharpness as sam_sharpness
from mtljax.trajectory._sharpness import worst_case_sharpness as worst_case_sharpness
from mtljax.trajectory._spectrum import Eigenvalues as Eigenvalues
from mtljax.trajectory._spectrum import Lanczos as Lanczos
from mtljax.trajectory._spectrum import SpectralDensity as SpectralDensity
from mtljax.trajectory._spectrum import (
    hessian_top_eigenvalues as hessian_top_eigenvalues,
)
from mtljax.trajectory._spectrum import lanczos as lanczos
from mtljax.trajectory._spectrum import spectral_density as spectral_density
