"""Model folders: what is in them, found by reading headers only, and the writing of new ones.

Owns the safetensors format, Hugging Face's folder layout, tied embeddings, sidecar files and Parquet tables. Reads and
writes through `pipeline.storage` alone; must not know torch, recipes or methods.
"""
