"""The experiments of Foret et al. (ICLR 2021): the printed numbers, the settings, and the trainings behind each."""
