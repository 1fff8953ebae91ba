"""What the kernels of this room share: which univariate functions there are on a uniform grid (docs/model.md, section 1)."""

from dataclasses import dataclass

KINDS = ("bspline", "piecewise_poly")
OCTET = 8  # basis functions are evaluated in eights, so that tiles are powers of two whatever the grid


@dataclass(frozen=True)
class Functions:
    """A family of functions that is linear in its coefficients, continued linearly outside [low, high]."""

    kind: str
    """bspline: B-splines of order k (polynomial degree k); piecewise_poly: an independent polynomial of degree k in every cell."""
    order: int
    """k, 1 to 3."""
    grid: int
    """G, the number of uniform cells."""
    low: float
    """Lower end of the grid."""
    high: float
    """Upper end of the grid."""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind={self.kind!r} has no kernel; use one of {', '.join(KINDS)}")
        if not 1 <= self.order <= 3:
            raise ValueError(f"order={self.order} must lie between 1 and 3; use 3 for cubic functions")
        if self.grid < 1:
            raise ValueError(f"grid={self.grid} must be at least 1; use 5")
        if not self.low < self.high:
            raise ValueError(f"high={self.high} must be above low={self.low}; use low=-3, high=3")

    @property
    def count(self) -> int:
        """n, the coefficients of one function."""
        return self.grid + self.order if self.kind == "bspline" else self.grid * (self.order + 1)

    @property
    def stride(self) -> int:
        """Coefficients from the first that is active in a cell to the first that is active in the next one."""
        return 1 if self.kind == "bspline" else self.order + 1

    @property
    def octets(self) -> int:
        """Eights of basis functions that hold all n."""
        return -(-self.count // OCTET)

    @property
    def inverse_step(self) -> float:
        """Cells a unit of the argument."""
        return self.grid / (self.high - self.low)
