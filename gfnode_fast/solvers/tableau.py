"""Butcher tableaus of the explicit Runge-Kutta methods, with torchdiffeq's error and midpoint rows.

Stages k_0 ... k_{J-1}; stage i > 0 is evaluated at t0 + alpha[i-1] dt on
y0 + dt Σ_j beta[i-1][j] k_j; the step ends at y1 = y0 + dt Σ_j solution[j] k_j.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

Row = tuple[float, ...]


@contextmanager
def kept() -> Iterator[None]:
    """Make tensors that outlive the call, also as a decorator: ordinary ones, made on the CPU,
    whatever inference mode or default device the first caller happens to be in.
    """
    with torch.inference_mode(False), torch.device("cpu"):
        yield


@dataclass(frozen=True)
class Tableau:
    """An explicit method; `error` and `mid` are empty for fixed-step methods.

    Attributes:
        order: the order torchdiffeq's step control uses.
        error: y1's error estimate is dt Σ_j error[j] k_j.
        mid: the state at the middle of the step, for dense output, is y0 + dt Σ_j mid[j] k_j.
    """

    name: str
    order: int
    alpha: Row
    beta: tuple[Row, ...]
    solution: Row
    error: Row = ()
    mid: Row = ()

    @property
    def num_stages(self) -> int:
        return len(self.alpha) + 1

    @property
    def is_adaptive(self) -> bool:
        return bool(self.error)

    @cached_property
    def ends_on_last_stage(self) -> bool:
        """Whether y1 is the point of the last stage (first same as last)."""
        return self.solution == (*self.beta[-1], 0)

    @cached_property
    @kept()
    def dense(self) -> Tensor:
        """P (4, J), float64: inside a step y(t0 + x dt) = y0 + dt Σ_j (Σ_p P[p, j] x^(p+1)) k_j.

        The quartic through y0, y_mid and y1 with slopes k_0 and k_{J-1} at the ends, torchdiffeq's
        `_interp_fit` rewritten on the stages.
        """
        y1 = torch.tensor(self.solution, dtype=torch.float64)
        mid = torch.tensor(self.mid, dtype=torch.float64)
        first, last = torch.eye(self.num_stages, dtype=torch.float64)[[0, -1]]
        return torch.stack(
            (
                first,
                last - 4 * first - 5 * y1 + 16 * mid,
                5 * first - 3 * last + 14 * y1 - 32 * mid,
                2 * (last - first) - 8 * y1 + 16 * mid,
            )
        )


@lru_cache(maxsize=64)
@kept()
def dense_tensor(tableau: Tableau, device: torch.device) -> Tensor:
    """`Tableau.dense` on a device, moved there once."""
    return tableau.dense.to(device)


@lru_cache(maxsize=256)
@kept()
def row_tensor(row: Row, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A row of coefficients as a tensor, made once per dtype and device."""
    return torch.tensor(row, dtype=torch.float64).to(device=device, dtype=dtype)


DOPRI5 = Tableau(
    name="dopri5",
    order=5,
    alpha=(1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0),
    beta=(
        (1 / 5,),
        (3 / 40, 9 / 40),
        (44 / 45, -56 / 15, 32 / 9),
        (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
        (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
        (35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
    ),
    solution=(35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84, 0),
    error=(
        35 / 384 - 1951 / 21600,
        0,
        500 / 1113 - 22642 / 50085,
        125 / 192 - 451 / 720,
        -2187 / 6784 - -12231 / 42400,
        11 / 84 - 649 / 6300,
        -1 / 60,
    ),
    mid=(
        6025192743 / 30085553152 / 2,
        0,
        51252292925 / 65400821598 / 2,
        -2691868925 / 45128329728 / 2,
        187940372067 / 1594534317056 / 2,
        -1776094331 / 19743644256 / 2,
        11237099 / 235043384 / 2,
    ),
)

BOSH3 = Tableau(
    name="bosh3",
    order=3,
    alpha=(1 / 2, 3 / 4, 1.0),
    beta=((1 / 2,), (0, 3 / 4), (2 / 9, 1 / 3, 4 / 9)),
    solution=(2 / 9, 1 / 3, 4 / 9, 0),
    error=(2 / 9 - 7 / 24, 1 / 3 - 1 / 4, 4 / 9 - 1 / 3, -1 / 8),
    mid=(0, 0.5, 0, 0),
)

ADAPTIVE_HEUN = Tableau(
    name="adaptive_heun",
    order=2,
    alpha=(1.0,),
    beta=((1.0,),),
    solution=(0.5, 0.5),
    error=(0.5, -0.5),
    mid=(0.5, 0),
)

FEHLBERG2 = Tableau(
    name="fehlberg2",
    order=2,
    alpha=(1 / 2, 1.0),
    beta=((1 / 2,), (1 / 256, 255 / 256)),
    solution=(1 / 512, 255 / 256, 1 / 512),
    error=(-1 / 512, 0, 1 / 512),
    mid=(0, 0.5, 0),
)

# Prince and Dormand, J. Comput. Appl. Math. 7 (1981) 67; the midpoint row is the method's own.
DOPRI8 = Tableau(
    name="dopri8",
    order=8,
    alpha=(
        1 / 18,
        1 / 12,
        1 / 8,
        5 / 16,
        3 / 8,
        59 / 400,
        93 / 200,
        5490023248 / 9719169821,
        13 / 20,
        1201146811 / 1299019798,
        1,
        1,
        1,
    ),
    beta=(
        (1 / 18,),
        (
            1 / 48,
            1 / 16,
        ),
        (
            1 / 32,
            0,
            3 / 32,
        ),
        (
            5 / 16,
            0,
            -75 / 64,
            75 / 64,
        ),
        (
            3 / 80,
            0,
            0,
            3 / 16,
            3 / 20,
        ),
        (
            29443841 / 614563906,
            0,
            0,
            77736538 / 692538347,
            -28693883 / 1125000000,
            23124283 / 1800000000,
        ),
        (
            16016141 / 946692911,
            0,
            0,
            61564180 / 158732637,
            22789713 / 633445777,
            545815736 / 2771057229,
            -180193667 / 1043307555,
        ),
        (
            39632708 / 573591083,
            0,
            0,
            -433636366 / 683701615,
            -421739975 / 2616292301,
            100302831 / 723423059,
            790204164 / 839813087,
            800635310 / 3783071287,
        ),
        (
            246121993 / 1340847787,
            0,
            0,
            -37695042795 / 15268766246,
            -309121744 / 1061227803,
            -12992083 / 490766935,
            6005943493 / 2108947869,
            393006217 / 1396673457,
            123872331 / 1001029789,
        ),
        (
            -1028468189 / 846180014,
            0,
            0,
            8478235783 / 508512852,
            1311729495 / 1432422823,
            -10304129995 / 1701304382,
            -48777925059 / 3047939560,
            15336726248 / 1032824649,
            -45442868181 / 3398467696,
            3065993473 / 597172653,
        ),
        (
            185892177 / 718116043,
            0,
            0,
            -3185094517 / 667107341,
            -477755414 / 1098053517,
            -703635378 / 230739211,
            5731566787 / 1027545527,
            5232866602 / 850066563,
            -4093664535 / 808688257,
            3962137247 / 1805957418,
            65686358 / 487910083,
        ),
        (
            403863854 / 491063109,
            0,
            0,
            -5068492393 / 434740067,
            -411421997 / 543043805,
            652783627 / 914296604,
            11173962825 / 925320556,
            -13158990841 / 6184727034,
            3936647629 / 1978049680,
            -160528059 / 685178525,
            248638103 / 1413531060,
            0,
        ),
        (
            14005451 / 335480064,
            0,
            0,
            0,
            0,
            -59238493 / 1068277825,
            181606767 / 758867731,
            561292985 / 797845732,
            -1041891430 / 1371343529,
            760417239 / 1151165299,
            118820643 / 751138087,
            -528747749 / 2220607170,
            1 / 4,
        ),
    ),
    solution=(
        14005451 / 335480064,
        0,
        0,
        0,
        0,
        -59238493 / 1068277825,
        181606767 / 758867731,
        561292985 / 797845732,
        -1041891430 / 1371343529,
        760417239 / 1151165299,
        118820643 / 751138087,
        -528747749 / 2220607170,
        1 / 4,
        0,
    ),
    error=(
        14005451 / 335480064 - 13451932 / 455176623,
        0,
        0,
        0,
        0,
        -59238493 / 1068277825 - -808719846 / 976000145,
        181606767 / 758867731 - 1757004468 / 5645159321,
        561292985 / 797845732 - 656045339 / 265891186,
        -1041891430 / 1371343529 - -3867574721 / 1518517206,
        760417239 / 1151165299 - 465885868 / 322736535,
        118820643 / 751138087 - 53011238 / 667516719,
        -528747749 / 2220607170 - 2 / 45,
        1 / 4,
        0,
    ),
    mid=(
        0.04103130360739393,
        0,
        0,
        0,
        0,
        0.05100562801991382,
        0.2388930677412202,
        0.3096870143996103,
        -0.2172325471755352,
        0.07833405679331928,
        -0.0018614369715579948,
        0.007072844202678841,
        0.00690847373200576,
        -0.013838404349047373,
    ),
)

EULER = Tableau(name="euler", order=1, alpha=(), beta=(), solution=(1.0,))

MIDPOINT = Tableau(name="midpoint", order=2, alpha=(1 / 2,), beta=((1 / 2,),), solution=(0, 1.0))

HEUN2 = Tableau(name="heun2", order=2, alpha=(1.0,), beta=((1.0,),), solution=(1 / 2, 1 / 2))

HEUN3 = Tableau(
    name="heun3",
    order=3,
    alpha=(1 / 3, 2 / 3),
    beta=((1 / 3,), (0, 2 / 3)),
    solution=(1 / 4, 0, 3 / 4),
)

# The 3/8 rule, torchdiffeq's "rk4"
RK4 = Tableau(
    name="rk4",
    order=4,
    alpha=(1 / 3, 2 / 3, 1.0),
    beta=((1 / 3,), (-1 / 3, 1.0), (1.0, -1.0, 1.0)),
    solution=(1 / 8, 3 / 8, 3 / 8, 1 / 8),
)

ADAPTIVE = {t.name: t for t in (DOPRI5, BOSH3, ADAPTIVE_HEUN, FEHLBERG2, DOPRI8)}
FIXED_GRID = {t.name: t for t in (EULER, MIDPOINT, HEUN2, HEUN3, RK4)}
TABLEAUS = ADAPTIVE | FIXED_GRID
