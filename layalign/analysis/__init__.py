"""The paper's analyses of a trained model (section 5.4, appendix A), and their figures."""
