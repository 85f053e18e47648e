"""Reading data sets of several forms into one ``QuestionSet``, and their pictures."""
