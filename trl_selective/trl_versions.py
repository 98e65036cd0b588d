"""Which TRL was this package verified with? TRL's insides move; what this package needs of them is pinned in tests/test_trl_contract.py."""

import warnings

from packaging.version import Version

VERIFIED = ("1.14", "1.16")


def warn_of_newer_trl(version: str) -> None:
    """Warn once of a TRL that is newer than all that were verified."""
    if Version(version).release[:2] > Version(VERIFIED[-1]).release:
        warnings.warn(
            f"trl_selective was verified with TRL {' and '.join(VERIFIED)}, and this is TRL {version}. Should training fail or differ, install "
            f"an earlier one (`pip install 'trl=={VERIFIED[-1]}.*'`), or a newer trl_selective. `pytest tests/test_trl_contract.py` of its "
            "repository tells whether what it needs of TRL is still there.",
            stacklevel=3,
        )
