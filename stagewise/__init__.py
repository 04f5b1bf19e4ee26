"""Stagewise: train a domain language model in stages, one readable script a stage.

The scripts at the top of the repository (pretraining.py, supervised_finetuning.py, ...) join what lives here. Imports
go down only; neighbours on a floor (left | right) never import each other:

    4  the stage scripts, merge_peft_adapter, convert_dataset, inference
    3  stagewise.trainers   |  stagewise.run        Trainer subclasses          | start, save, resume, report a run
    2  stagewise.data       |  stagewise.modeling   rows -> token ids           | tokenizer, model, adapter
    1  stagewise.losses                             pure torch: no model, no tokenizer, no file
    0  stagewise.arguments  |  template             the command line            | chat templates
       stagewise.distributed                        the engine of several processes, before they form a group
       stagewise.devices                            what an accelerator can do
       stagewise.machines                           which machines share output_dir, and who keeps it
       stagewise.errors, stagewise.old_spellings    what a user can mend; flags of 2023 and today's names for them
       stagewise.multitask_arguments                flags of the multi-task loss, for the two scripts that inherit them

tests/test_floors.py holds the code to this table.
"""
