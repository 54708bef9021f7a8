"""The configurations of PaddleNLP that users bring along."""

from __future__ import annotations

from pathlib import Path

import pytest
from config_testing import refused_names

from pypkg.config import load_settings
from pypkg.models.architecture.registry import load_config
from pypkg.training.start.layout import degrees, layout_problems

REPO = Path(__file__).resolve().parents[2]
PADDLENLP = sorted((REPO / "tests/golden/paddlenlp_configs").glob("*.json"))

# What a file of PaddleNLP's asks for that this version refuses; the others can be run as they are.
REFUSED = {
    "pretrain_argument.chatglm2": {"metric_for_best_model"},
}


def test_the_files_are_there():
    assert len(PADDLENLP) == 17
    assert set(REFUSED) < {file.stem for file in PADDLENLP}


@pytest.mark.parametrize("file", PADDLENLP, ids=lambda file: file.stem)
def test_paddlenlp_configs_parse_and_exactly_the_unsupported_is_refused(file):
    assert refused_names(file) == REFUSED.get(file.stem, set())


@pytest.mark.parametrize("file", PADDLENLP, ids=lambda file: file.stem)
def test_paddlenlp_layouts_fit_their_models_on_eight_processes(file):
    settings = load_settings([str(file)])
    config = load_config(settings.model_name_or_path)
    assert layout_problems(settings, config, 8) == []
    assert degrees(settings, 8).world_size == 8


def test_a_file_may_begin_with_a_byte_order_mark(tmp_path):
    marked = tmp_path / "run.json"
    marked.write_bytes(b"\xef\xbb\xbf" + PADDLENLP[0].read_bytes())
    assert load_settings([str(marked)]) == load_settings([str(PADDLENLP[0])])
