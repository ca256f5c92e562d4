"""Write gpt_neox.npz: a small GPT-NeoX of Hugging Face transformers.

  python3.11 -m venv goldenv
  goldenv/bin/pip install torch==2.13.0 transformers==5.23.0 safetensors
  goldenv/bin/python tests/golden/make_gpt_neox.py

The file holds the two files that `save_pretrained` writes, tokens, logits, the
mean next-token loss and its gradient by each weight of the second layer.
"""

from transformers import GPTNeoXConfig, GPTNeoXForCausalLM
from writing import write


def main():
  """Make the model and write the file."""
  config = GPTNeoXConfig(
    vocab_size=23,
    hidden_size=12,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=20,
    rotary_pct=0.7,
    max_position_embeddings=32,
    attn_implementation="eager",
  )
  write("gpt_neox", GPTNeoXForCausalLM(config), "layers.1.")


if __name__ == "__main__":
  main()
