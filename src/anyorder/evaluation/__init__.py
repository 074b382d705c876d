"""What a trained model is compared with, and how: measures and controls."""
