"""Symbols and covalent radii of the elements."""

from __future__ import annotations

import numpy as np

from gfnode_fast.data.trajectory import Array

_SYMBOLS = (
    "H He Li Be B C N O F Ne Na Mg Al Si P S Cl Ar K Ca Sc Ti V Cr Mn Fe Co Ni Cu Zn Ga Ge As "
    "Se Br Kr Rb Sr Y Zr Nb Mo Tc Ru Rh Pd Ag Cd In Sn Sb Te I Xe Cs Ba La Ce Pr Nd Pm Sm Eu Gd "
    "Tb Dy Ho Er Tm Yb Lu Hf Ta W Re Os Ir Pt Au Hg Tl Pb Bi Po At Rn Fr Ra Ac Th Pa U Np Pu Am "
    "Cm Bk Cf Es Fm Md No Lr Rf Db Sg Bh Hs Mt Ds Rg Cn Nh Fl Mc Lv Ts Og"
)
# Hydrogen (1) to oganesson (118).
SYMBOLS = tuple(_SYMBOLS.split())

# Cordero et al., "Covalent radii revisited", Dalton Trans. 2008, 2832 (doi:10.1039/b801115j),
# table 2, in Å, hydrogen (1) to curium (96); sp3 carbon, low-spin Mn, Fe and Co.
# fmt: off
_RADII = (
    0.31, 0.28, 1.28, 0.96, 0.84, 0.76, 0.71, 0.66, 0.57, 0.58, 1.66, 1.41,
    1.21, 1.11, 1.07, 1.05, 1.02, 1.06, 2.03, 1.76, 1.70, 1.60, 1.53, 1.39,
    1.39, 1.32, 1.26, 1.24, 1.32, 1.22, 1.22, 1.20, 1.19, 1.20, 1.20, 1.16,
    2.20, 1.95, 1.90, 1.75, 1.64, 1.54, 1.47, 1.46, 1.42, 1.39, 1.45, 1.44,
    1.42, 1.39, 1.39, 1.38, 1.39, 1.40, 2.44, 2.15, 2.07, 2.04, 2.03, 2.01,
    1.99, 1.98, 1.98, 1.96, 1.94, 1.92, 1.92, 1.89, 1.90, 1.87, 1.87, 1.75,
    1.70, 1.62, 1.51, 1.44, 1.41, 1.36, 1.36, 1.32, 1.45, 1.46, 1.48, 1.40,
    1.50, 1.50, 2.60, 2.21, 2.15, 2.06, 2.00, 1.96, 1.90, 1.87, 1.80, 1.69,
)
# fmt: on
MAX_ATOMIC_NUMBER = len(_RADII)


def covalent_radii(numbers: Array) -> Array:
    """Covalent radius of each atom: (N,) float64, Å. Source: Cordero et al. 2008, table 2.

    Raises
    ------
    ValueError
        For atomic numbers outside 1 … 96, which the table does not have.
    """
    numbers = np.asarray(numbers)
    known = (numbers >= 1) & (numbers <= MAX_ATOMIC_NUMBER)
    if not known.all():
        raise ValueError(
            f"covalent_radii: `numbers` must lie in 1 … {MAX_ATOMIC_NUMBER}, got "
            f"{numbers[~known][0]}; use bonds='published' for other elements"
        )
    radii: Array = np.asarray(_RADII, dtype=np.float64)[numbers - 1]
    return radii
