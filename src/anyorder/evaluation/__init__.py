"""What a trained model is measured by, and compared with (`baselines`)."""
