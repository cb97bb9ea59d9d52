"""What bench/quality.py is made of: texts, tasks, models, decoding, policies, tables."""
