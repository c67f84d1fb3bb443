"""Uncertainty measures of one voxel (definitions, section 2).

Binary entropies are in bits, so that they lie in [0, 1]; the four-class entropy is divided by log2 4.
Everything is computed in float64, whatever the stored precision.
"""

import numpy as np

MEASURES = (
    "entropy",
    "expected_entropy",
    "mutual_information",
    "variance",
    "deterministic_entropy",
    "boundary_proximity",
)
# the two parts of mutual_information, where passes come from several members and these have several passes each:
# entropy − member_entropy and member_entropy − expected_entropy, member_entropy being the mean over members of the
# entropy of a member's own mean; absent, and not null, for any other model
BETWEEN_MEMBERS = "mutual_information_between_members"
WITHIN_MEMBERS = "mutual_information_within_members"
MEMBER_MEASURES = (BETWEEN_MEMBERS, WITHIN_MEMBERS)
# the same score, against the errors of the deterministic pass itself
OWN_ERRORS = "deterministic_entropy_own"
ENTROPY_4CLASS = "entropy_4class"


_LN2 = np.log(2.0)
_LOG_ZERO = -1e4  # far below the logarithm of the smallest number, and zero times it is zero


def binary_entropy(probability):
    """Return the entropy of a yes-or-no event in bits, float64, same shape.

    probability : array of any shape, values in [0, 1]; 0 and 1 give 0
    """
    probability = np.asarray(probability, np.float64)
    return binary_entropy_of(probability, *logarithms(probability))


def logarithms(probability):
    """Return log p and log(1 - p), natural, float64; of zero, -1e4 in place of minus infinity.

    probability : float64 array, values in [0, 1]
    """
    with np.errstate(divide="ignore"):
        return np.maximum(np.log(probability), _LOG_ZERO), np.maximum(np.log1p(-probability), _LOG_ZERO)


def binary_entropy_of(probability, log_p, log_1mp):
    """Return `binary_entropy` of probabilities whose `logarithms` are known."""
    entropy = probability * log_p
    entropy += (1 - probability) * log_1mp
    entropy *= -1 / _LN2
    entropy += 0.0  # turns -0.0 into 0.0
    return entropy


def mutual_information(probability, expected_entropy):
    """Return predictive entropy minus expected entropy, bits, float64, clipped at 0.

    probability : mean over passes, any shape, values in [0, 1]
    expected_entropy : mean over passes of the entropy, bits, same shape
    """
    return np.maximum(binary_entropy(probability) - np.asarray(expected_entropy, np.float64), 0)


def entropy_4class(distribution):
    """Return the entropy of a four-class distribution divided by log2 4, float64, in [0, 1].

    distribution : array (4, …) that sums to one over its first axis
    """
    distribution = np.asarray(distribution, np.float64)
    entropy = np.zeros(distribution.shape[1:])
    for probability in distribution:
        entropy -= probability * np.log(np.maximum(probability, np.finfo(np.float64).tiny))
    entropy /= 2 * _LN2
    return np.clip(entropy, 0, 1)  # rounding can leave the four quarters at 1 + 2e-16


def boundary_proximity(distance_predicted):
    """Return the negative distance to the predicted boundary, mm, float64: the nearer, the more uncertain.

    distance_predicted : signed distance, mm, negative inside; NaN where there is no boundary (stays NaN)
    """
    return -np.abs(np.asarray(distance_predicted, np.float64))
