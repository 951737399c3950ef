"""What a run tells: numbers, a progress line, pictures, a page."""
