"""Pictures are files that others can read, and look alike wherever they are drawn."""

from itertools import combinations
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib import colors, image, rc_context, rcParams

from trl_selective.reporting.style import PALETTE, colours, picture

# What eyes without the cones for red see (Machado, Oliveira and Fernandes 2009, doi:10.1109/TVCG.2009.113, severity 1), and without those for green.
BLINDNESS = {
    "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
}


def save(path, num_panels=2):
    with picture(path, num_panels) as (_, all_axes):
        for axes in all_axes:
            axes.plot([1, 2], [1, 2])


def test_png(tmp_path):
    save(tmp_path / "new folder" / "a.png")
    pixels = image.imread(tmp_path / "new folder" / "a.png")
    assert pixels.shape[:2] == (435, 1020)  # 0.4 + 2.5 inches of 150 dots, and 2 * 3.4
    assert (pixels[0, 0, :3] == 1).all()  # white
    assert len(np.unique(pixels.reshape(-1, pixels.shape[-1]), axis=0)) > 10


def test_pdf(tmp_path):
    save(tmp_path / "a.pdf")
    content = (tmp_path / "a.pdf").read_bytes()
    assert content.startswith(b"%PDF-")
    assert content.rstrip().endswith(b"%%EOF")


def test_svg(tmp_path):
    save(tmp_path / "a.svg")
    assert ElementTree.parse(tmp_path / "a.svg").getroot().tag.endswith("svg")


def test_unknown_suffix(tmp_path):
    with pytest.raises(ValueError, match="Format 'xyz' is not supported"):
        save(tmp_path / "a.xyz")


def test_the_settings_of_a_script_neither_change_nor_matter(tmp_path):
    save(tmp_path / "a.png")
    with rc_context({"figure.facecolor": "black", "text.color": "white", "axes.facecolor": "black"}):
        before = dict(rcParams)
        save(tmp_path / "b.png")
        assert dict(rcParams) == before
    np.testing.assert_array_equal(image.imread(tmp_path / "a.png"), image.imread(tmp_path / "b.png"))


@pytest.mark.parametrize("eyes", BLINDNESS)
def test_the_palette_is_told_apart_without_red_or_green(eyes):
    linear = [np.array(colors.to_rgb(colour)) ** 2.2 for colour in PALETTE]
    seen = [np.clip(np.array(BLINDNESS[eyes]) @ colour, 0, 1) ** (1 / 2.2) for colour in linear]
    distances = [np.abs(one - other).max() for one, other in combinations(seen, 2)]
    assert min(distances) > 0.12  # of 1


@pytest.mark.parametrize("number", [1, 6, 7, 20])
def test_one_colour_for_each_name(number):
    names = [str(each) for each in range(number)]
    assert len(set(colours(names).values())) == number
    assert list(colours(names)) == names
