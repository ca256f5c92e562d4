"""Write mistral.npz: a small Mistral of Hugging Face transformers.

  python3.11 -m venv goldenv
  goldenv/bin/pip install torch==2.13.0 transformers==5.23.0 safetensors
  goldenv/bin/python tests/golden/make_mistral.py

Two heads of keys for four of queries, and a window shorter than the row. The
file holds the two files that `save_pretrained` writes, tokens, logits, the
mean next-token loss and its gradient by each weight of the second layer.
"""

from transformers import MistralConfig, MistralForCausalLM
from writing import write


def main():
  """Make the model and write the file."""
  config = MistralConfig(
    vocab_size=23,
    hidden_size=12,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=4,
    intermediate_size=20,
    sliding_window=5,
    max_position_embeddings=32,
    attn_implementation="eager",
  )
  write("mistral", MistralForCausalLM(config), "layers.1.")


if __name__ == "__main__":
  main()
