"""Languages are told apart offline, and their names are understood."""

import pytest

from gptoss_jax.errors import UsageError
from gptoss_jax.evaluation.languages import NAMES, code_of, identify
from gptoss_jax.evaluation.numbers import LANGUAGES, spell

pytest.importorskip("py3langid", reason="the language check needs py3langid")

SENTENCES = {
    "en": "The train to the coast leaves at half past nine in the morning.", "de": "Der Zug an die Küste fährt morgens um halb zehn ab.",
    "fr": "Le train pour la côte part à neuf heures et demie du matin.", "es": "El tren hacia la costa sale a las nueve y media de la mañana.",
    "it": "Il treno per la costa parte alle nove e mezza del mattino.", "pt": "O comboio para a costa parte às nove e meia da manhã.",
    "nl": "De trein naar de kust vertrekt om half tien in de ochtend.", "pl": "Pociąg na wybrzeże odjeżdża o wpół do dziesiątej rano.",
    "ru": "Поезд на побережье отправляется в половине десятого утра.", "ja": "海岸行きの列車は朝九時半に出発します。",
    "zh": "开往海边的火车早上九点半出发。", "hi": "तट की ओर जाने वाली ट्रेन सुबह साढ़े नौ बजे निकलती है।",
}  # fmt: skip


@pytest.mark.parametrize("code", SENTENCES)
def test_sentences(code):
    found, probability = identify(SENTENCES[code])
    assert found == code and 0.5 < probability <= 1


def test_candidates_decide_short_texts():
    codes = tuple(LANGUAGES.values())
    right = [identify(spell(n, name), codes)[0] == code for name, code in LANGUAGES.items() for n in range(100, 10000, 397)]
    assert sum(right) / len(right) > 0.95
    assert identify("ventuno", ("it",))[0] == "it"


def test_names_and_codes():
    assert [code_of(name) for name in ("German", "german", "de", "de-AT", " DE ", "pt_BR")] == ["de", "de", "de", "de", "de", "pt"]
    known = set(identify.__globals__["_identifier"](()).labels)
    assert set(NAMES.values()) <= known
    with pytest.raises(UsageError, match="did you mean 'German'"):
        code_of("Germann")
