"""The logits of real PEFT with what this package made of adapters of mlx_lm; run in both environments.

transformers 5 with PEFT 0.21.2 writes them, 4.57.6 with PEFT 0.18.1 has to agree: fused experts have other axes there.
"""

import warnings

import torch
from base import FIXTURES, V5, base, load_file, merged, save_golden
from peft import PeftModel, get_peft_model_state_dict
from torch_common import logits_and_margin

for folder in sorted(FIXTURES.glob("trained_*")):
    model, ids = base()
    plain = logits_and_margin(model, ids)[0]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing|unexpected).*", category=UserWarning)
        model = PeftModel.from_pretrained(model, folder / "peft").eval()
    stored = load_file(folder / "peft" / "adapter_model.safetensors")
    loaded = get_peft_model_state_dict(model, save_embedding_layers=False)
    assert loaded.keys() == stored.keys(), loaded.keys() ^ stored.keys()
    assert all(torch.equal(loaded[name], value) for name, value in stored.items())
    logits = merged(model, ids)
    if V5:
        save_golden(folder, ids, logits, plain)
    else:
        golden = load_file(folder / "golden.safetensors")
        print(folder.name, "differs by", float((logits - golden["logits"]).abs().max()))
        assert torch.allclose(logits, golden["logits"], atol=1e-4)
