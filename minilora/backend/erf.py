"""The error function, which NumPy does not have and the exact GELU needs.

Both approximations are our own fits (against mpmath with 40 digits), tested against `math.erf`.
"""

from __future__ import annotations

from typing import Any

# float32: erf(x) ≈ tanh(x p(x²)), |error| < 3e-7. atanh(erf(x))/x is smooth and even, so a polynomial of degree 6 in x² does,
# and tanh is the cheapest of NumPy's vectorised functions. Beyond |x| = 3.9 erf is 1 in float32.
TANH_POLYNOMIAL = (1.1283797054609048, 0.10276548157780832, -0.00018438411375073315, -0.0006257190295853252,
                   8.971228764783933e-05, -5.985619941194272e-06, 1.5895440988898772e-07)
TANH_LIMIT = 3.9

# float64: erfc(|x|) = t exp(-x² + P(2t - 1)) with t = 2/(2 + |x|) in (0, 1] and a Chebyshev series P, |error| < 1e-15.
CHEBYSHEV = (-0.6513268598908547, 0.6419697923564902, 0.019476473204185836, -0.009561514786808632, -0.000946595344482037,
             0.0003668394978527616, 4.25233248069076e-05, -2.0278578112534072e-05, -1.6242900046471965e-06,
             1.3036558355806933e-06, 1.5626441721896924e-08, -8.523809591475833e-08, 6.529054438931733e-09,
             5.059343495717397e-09, -9.91364156657679e-10, -2.2736512212991125e-10, 9.646791085834715e-11,
             2.3940382432932026e-12, -6.886027685108663e-12, 8.94488084189164e-13, 3.1309198487229924e-13,
             -1.1270807045583897e-13, 3.809393568594243e-16, 7.106246709187863e-15, -1.5231751411988713e-15,
             -9.443024336721747e-17, 1.208813342899712e-16, -2.802664298878553e-17)


def erf(xp: Any, x: Any) -> Any:
    """erf(x) elementwise, to 3e-7 in float32 and 1e-15 in float64. Raises TypeError for complex x."""
    if x.dtype.kind == "c":
        raise TypeError("erf has no complex form here: check functions with the exact GELU by central differences")
    if x.dtype.itemsize < 8:
        x = xp.clip(x, -TANH_LIMIT, TANH_LIMIT)
        return xp.tanh(x * horner(TANH_POLYNOMIAL, x * x))
    a = abs(x)
    t = 2.0 / (2.0 + a)
    z = 4.0 * t - 2.0                                      # twice the argument of the Chebyshev polynomials
    high, low = 0.0 * z, 0.0 * z                           # Clenshaw's recurrence
    for c in CHEBYSHEV[:0:-1]:
        high, low = z * high - low + c, high
    tail = t * xp.exp(0.5 * z * high - low + CHEBYSHEV[0] - a * a)
    return xp.sign(x) * (1.0 - tail)


def horner(coefficients: tuple[float, ...], s: Any) -> Any:
    """c_0 + c_1 s + c_2 s² + …"""
    y: Any = coefficients[-1]
    for c in coefficients[-2::-1]:
        y = y * s + c
    return y
