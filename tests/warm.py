"""What the servers that tests fork from have done before: import the slow libraries, and compile the patterns
that transformers compares the names of weights with."""

# ruff: noqa: F401
import accelerate.tracking
import h5py
import matplotlib.pyplot
import peft
import scipy.io
import scipy.ndimage
import scipy.signal
import sklearn.linear_model
import sklearn.metrics
import sklearn.preprocessing
import torch._dynamo
import torch.distributed.launcher.api
import torch.utils.tensorboard
import transformers.integrations.tensor_parallel
import transformers.masking_utils
import transformers.models.auto.modeling_auto
import transformers.models.llama.modeling_llama
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

get_checkpoint_conversion_mapping("llama")
