"""Solvers of small convex problems over T tasks, for ``jit`` and ``vmap``."""

from mtljax.solvers._bargaining import solve_bargaining as solve_bargaining
from mtljax.solvers._conditional import on_present as on_present
from mtljax.solvers._cone import project_cone as project_cone
from mtljax.solvers._max_min_ball import max_min_in_ball as max_min_in_ball
from mtljax.solvers._min_norm import min_norm_point as min_norm_point
from mtljax.solvers._nonnegative_qp import QPSolution as QPSolution
from mtljax.solvers._nonnegative_qp import nonnegative_qp as nonnegative_qp
from mtljax.solvers._simplex import project_simplex as project_simplex
from mtljax.solvers._spectral import pinv_solve as pinv_solve
from mtljax.solvers._status import SolverStatus as SolverStatus
from mtljax.solvers._status import unsolved as unsolved
