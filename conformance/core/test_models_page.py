"""docs/models.md: what results become which cells."""

import family_page

LIMITS = {"within": 1e-3, "drawn": 1e-3, "norm": 1e-3}
EXACT = {"state": "exact", "lora": {"state": "exact"}}
MADE = {"state": "made"}


def row(name: str, text: str) -> list[str]:
    lines = [
        line
        for line in text.splitlines()
        if line.startswith("|") and name in line.split("|")[1].replace(",", " ").split()
    ]
    assert len(lines) == 1
    return [cell.strip() for cell in lines[0].split("|")[2:-1]]


def test_results_become_cells_and_like_reasons_share_a_number() -> None:
    refused = lambda name: {"state": "refused", "reason": f"model.path '/x/{name}' is of type '{name}', unknown"}
    results = {
        "llama": {"made": MADE, "torch": EXACT, "jax": EXACT | {"lora": {"state": "refused", "reason": "no LoRA"}}},
        "opt": {"made": MADE, "torch": EXACT | {"window": "rows beyond the window"}, "mlx": refused("opt")},
        "bloom": {
            "made": MADE,
            "torch": {"state": "wrong", "reason": "log-probs 1 nat apart"},
            "mlx": refused("bloom"),
        },
        "xglm_like": {"made": MADE, "torch": EXACT},
        "other_like": {"made": MADE, "torch": EXACT},
        "unmade": {"made": {"state": "fails", "reason": "no size"}},
    }
    text = family_page.text_of(results, LIMITS)
    assert row("llama", text) == ["exact", "full 1", ""]
    number = row("opt", text)[2].removeprefix("refused ")
    assert row("opt", text) == ["window", "", f"refused {number}"]
    assert row("bloom", text)[0].startswith("**wrong** ")
    assert row("bloom", text)[2] == f"refused {number}"
    assert f"{number}. mlx: the model is of type 'opt', unknown" in text
    assert "| xglm_like, other_like | exact |  |  |" in text
    assert (
        "Of 5 families, torch: 4 exact, 0 refused, 1 neither; jax: 1 exact, 0 refused; mlx: 0 exact, 2 refused." in text
    )
    assert "unmade" in text.rpartition("Not tried")[2]


def test_the_page_says_when_and_with_what_each_column_was_tried() -> None:
    new, older = (EXACT | {"tried": f"on {day} with jax 0.{n}"} for day, n in (("2026-11-26", 2), ("2026-11-20", 1)))
    results = {name: {"made": MADE, "jax": new} for name in ("llama", "qwen2")}
    results |= {"opt": {"made": MADE, "jax": older, "torch": EXACT}}
    text = family_page.text_of(results, LIMITS)
    assert "jax (1 families) on 2026-11-20 with jax 0.1; jax (2 families) on 2026-11-26 with jax 0.2" in text
    assert "Tried: torch (1 families) not recorded when; " in text
    assert all(f"{backend} (" in family_page.PAGE.read_text() for backend in family_page.BACKENDS)


def test_the_page_is_short_and_nothing_on_it_fails() -> None:
    text = family_page.PAGE.read_text()
    assert len(text.splitlines()) <= 200
    assert "**fails**" not in text
    assert "/tmp/" not in text
