"""Generation: `generate` on the model, answerers of lists of texts, resumable jobs, a transformers pipeline. Import the module you need."""
