"""Datasets on disk: file format, tokenizers, order of samples, preparation."""
