import subprocess
import sys
import warnings
from importlib.metadata import version

import pytest

from trl_selective.trl_versions import VERIFIED, warn_of_newer_trl


@pytest.mark.parametrize("newer", ["1.17.0", "1.17.0.dev0", "2.0"])
def test_a_newer_trl_is_named(newer):
    with pytest.warns(UserWarning, match=f"verified with TRL 1.14 and 1.16, and this is TRL {newer}.*'trl==1.16"):
        warn_of_newer_trl(newer)


@pytest.mark.parametrize("known", ["1.14.0", "1.14.2", "1.16.0", "1.16.9"])
def test_a_verified_trl_is_not(known):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_newer_trl(known)


def test_the_trl_of_the_tests_is_verified():
    assert version("trl").rpartition(".")[0] in VERIFIED


def test_the_warning_comes_at_import():
    code = "import trl; trl.__version__ = '1.99.0'; from trl_selective import SelectiveGuidanceGRPOTrainer"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("this is TRL 1.99.0") == 1
