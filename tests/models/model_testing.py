"""The golden fixtures: what original implementations gave for tiny models of each family."""

import json
from pathlib import Path
from typing import Any

import numpy as np

GOLDEN = Path(__file__).parents[1] / "golden"
# Folders below GOLDEN, each with config.json, model.safetensors and io.safetensors.
FIXTURES = sorted(
    str(file.parent.relative_to(GOLDEN))
    for file in GOLDEN.rglob("io.safetensors")
    if (file.parent / "config.json").exists()
)
FORMS = [
    (fixture, form)
    for fixture in FIXTURES
    for form in ("config.json", "config_v5.json")
    if (GOLDEN / fixture / form).exists()
]


def overrides(fixture: str) -> dict[str, Any]:
    """The fields of ModelConfig that the fixture's config.json does not tell."""
    meta = GOLDEN / fixture / "meta.json"
    variant = json.loads(meta.read_text()).get("variant", {}) if meta.exists() else {}
    if "norm_head" not in variant:
        return {}
    return {"position_embedding": variant["position"], "norm_head": variant["norm_head"]}


def assert_gradients_close(
    gradients: dict[str, np.ndarray], expected: dict[str, np.ndarray], tolerance: float = 1e-3
) -> None:
    """Relative to each one's norm, or where that is nothing but rounding, to a floor.

    A key bias moves all scores of a query alike, which softmax does not see, so where positions do
    not turn keys its gradient is zero in exact arithmetic.
    """
    assert gradients.keys() == expected.keys()
    floor = 1e-4 * max(np.linalg.norm(value) for value in expected.values())
    for name, gradient in gradients.items():
        assert gradient.shape == expected[name].shape, name
        error = np.linalg.norm(gradient - expected[name])
        error /= max(np.linalg.norm(expected[name]), floor)
        assert error < tolerance, f"{name}: relative error {error}"
