"""The commands: a module each, with ``run(settings)``, and ``CONTINUES``: whether it goes on where it was interrupted.

Settings are the module's ``Settings``, whose fields are the flags; ``parse(words)`` stands where there is more to it.
"""

SUMMARIES = {
    "compare": "train one network from the same seeds with several methods, and say which is better",
    "train": "train one network, with any of the methods, on one device or many",
    "evaluate": "the test accuracy of a finished training again, from its weights",
    "measure": "how flat the trained weights are: sharpness, Hessian, spectrum, with error bars",
    "landscape": "the loss around the trained weights of several methods, on one scale",
    "report": "one page from one or several comparisons, to read and to send",
    "doctor": "is SAM on, of the right size, and what does it cost?",
    "reproduce": "run an experiment of the SAM paper by its own protocol, and say which claims hold",
    "recipes": "list the settings of the SAM paper's trainings, or print one as a file to change",
    "sweep": "search the method, its radius, learning rate and weight decay by held-out accuracy",
    "variants": "list the methods: what each changes, its cost, radii, source and evidence",
}
"""Each command and what it does, in the order in which help lists them."""
