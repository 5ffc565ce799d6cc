"""Questions that are answered by running networks; they return records, which ``report`` draws."""
