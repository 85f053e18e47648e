"""The forms of data sets that are read into one ``QuestionSet``, and their pictures."""
