"""Small language models: corpora, training, generation, serving."""
