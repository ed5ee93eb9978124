from __future__ import annotations

import pytest

from tests.generate.models import save_model


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """`checkpoint(shape, precision, **model keys)`: a folder, written once."""
    made = {}

    def get(shape, precision, **model):
        key = (shape, precision, *sorted(model.items()))
        if key not in made:
            folder = tmp_path_factory.mktemp(f"{shape}_{precision}")
            made[key] = save_model(folder, shape, precision, **model)
        return made[key]

    return get
