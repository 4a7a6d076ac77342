"""A sentence-transformers folder of a model: SentenceTransformer(folder).encode gives the vectors of ``encode``."""

import json
from pathlib import Path

from tokenizers import Tokenizer

from bert_fast.data.files import new_folder
from bert_fast.data.tokenizer import save_tokenizer
from bert_fast.run.weights import silent_transformers
from bert_fast.use.pooling import POOLINGS, Recipe

# as every version of sentence-transformers names them
MODULES = {"Transformer": "", "Pooling": "1_Pooling", "Normalize": "2_Normalize"}


def save_sentence_transformer(
    model, tokenizer: Tokenizer, recipe: Recipe, folder: str | Path, *, drawn: tuple[str, ...] | list[str] = ()
) -> Path:
    """Writes ``model``, a BertModel, with all that ``recipe`` says, and returns the folder; whole or not at all.

    Weights whose names are in ``drawn`` (what load_model names as drawn at random, a pooler's) are left out: nothing
    reads them. Raises ValueError where ``folder`` is there and not empty.
    """
    folder = Path(folder)
    with new_folder(folder) as part:
        weights = {name: tensor for name, tensor in model.state_dict().items() if name not in drawn}
        with silent_transformers():
            model.save_pretrained(part, state_dict=weights)
        save_tokenizer(tokenizer, part, max_length=model.config.max_position_embeddings)
        for name, content in _settings(recipe, model.config.hidden_size).items():
            (part / name).parent.mkdir(exist_ok=True)
            (part / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return folder


def _settings(recipe: Recipe, width: int) -> dict[str, dict | list]:
    """The files beside weights and tokenizer, by name; a prompt without a name gets one."""
    kinds = {kind: path for kind, path in MODULES.items() if kind != "Normalize" or recipe.normalize}
    names = [name for name, prompt in recipe.prompts.items() if prompt == recipe.prompt]
    default = next(iter(names), "default") if recipe.prompt else None
    while default and not names and default in recipe.prompts:
        default += "_"
    prompts = recipe.prompts | ({default: recipe.prompt} if default else {})
    # flags are read by all versions, but have no order
    flags = {flag: mode in recipe.pooling for mode, flag in POOLINGS.items()}
    ordered = recipe.pooling == tuple(mode for mode in POOLINGS if mode in recipe.pooling)
    found: dict[str, dict | list] = {
        "modules.json": [
            {"idx": number, "name": str(number), "path": path, "type": f"sentence_transformers.models.{kind}"}
            for number, (kind, path) in enumerate(kinds.items())
        ],
        "sentence_bert_config.json": {"max_seq_length": recipe.max_length, "do_lower_case": recipe.lowercase},
        "config_sentence_transformers.json": {"prompts": prompts, "default_prompt_name": default},
        "1_Pooling/config.json": {
            "word_embedding_dimension": width,
            **(flags if ordered else {"pooling_mode": list(recipe.pooling)}),
            "include_prompt": recipe.include_prompt,
        },
    }
    return found | ({"2_Normalize/config.json": {}} if recipe.normalize else {})
