"""Write recurrentgemma.npz: a small RecurrentGemma of transformers.

  python3.11 -m venv goldenv
  goldenv/bin/pip install torch==2.13.0 transformers==5.23.0 safetensors
  goldenv/bin/python tests/golden/make_recurrentgemma.py

Four layers, which end within the pattern of three. The file holds the two
files that `save_pretrained` writes, tokens, logits, the mean next-token
loss and its gradient by each weight of the attention layer.
"""

from transformers import RecurrentGemmaConfig, RecurrentGemmaForCausalLM
from writing import write


def main():
  """Make the model and write the file."""
  config = RecurrentGemmaConfig(
    vocab_size=23,
    hidden_size=8,
    num_hidden_layers=4,
    num_attention_heads=2,
    num_key_value_heads=1,
    lru_width=8,
    intermediate_size=22,
    attention_window_size=5,
    logits_soft_cap=2.0,
    attn_implementation="eager",
  )
  write("recurrentgemma", RecurrentGemmaForCausalLM(config), "layers.2.")


if __name__ == "__main__":
  main()
