"""What people do with a trained model: evaluate, fill, embed, export, fine-tune."""
