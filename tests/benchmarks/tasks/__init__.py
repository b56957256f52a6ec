"""A real family of fine-tunes on real text tasks, merged by every method and scored on held-out rows."""
