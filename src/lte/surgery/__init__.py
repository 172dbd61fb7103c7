"""Finding the FFNs of a Hugging Face model, converting them in place, saving and loading the result."""
