"""Pictures to features and captions."""
