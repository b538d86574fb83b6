"""Methods of the literature as :class:`mtljax.Balancer` factories."""

from mtljax.methods._aligned_mtl import aligned_mtl as aligned_mtl
from mtljax.methods._cagrad import cagrad as cagrad
from mtljax.methods._conflict_free import conflict_free as conflict_free
from mtljax.methods._cosmos import cosmos as cosmos
from mtljax.methods._db_mtl import db_mtl as db_mtl
from mtljax.methods._dualproj import dualproj as dualproj
from mtljax.methods._dwa import dwa as dwa
from mtljax.methods._excess_mtl import excess_mtl as excess_mtl
from mtljax.methods._fairgrad import fairgrad as fairgrad
from mtljax.methods._famo import famo as famo
from mtljax.methods._gcs import gcs as gcs
from mtljax.methods._geometric_mean import geometric_mean as geometric_mean
from mtljax.methods._graddrop import graddrop as graddrop
from mtljax.methods._gradient_norm_weighting import (
    gradient_norm_weighting as gradient_norm_weighting,
)
from mtljax.methods._gradnorm import gradnorm as gradnorm
from mtljax.methods._gradvac import gradvac as gradvac
from mtljax.methods._igb_v1 import igb_v1 as igb_v1
from mtljax.methods._igb_v2 import IGBAgent as IGBAgent
from mtljax.methods._igb_v2 import IGBPhases as IGBPhases
from mtljax.methods._igb_v2 import igb_v2 as igb_v2
from mtljax.methods._imtl_g import imtl_g as imtl_g
from mtljax.methods._imtl_l import imtl_l as imtl_l
from mtljax.methods._krum import krum as krum
from mtljax.methods._linear import linear as linear
from mtljax.methods._mgda import mgda as mgda
from mtljax.methods._moco import moco as moco
from mtljax.methods._modo import modo as modo
from mtljax.methods._nash_mtl import nash_mtl as nash_mtl
from mtljax.methods._ol_aux import ol_aux as ol_aux
from mtljax.methods._pbi import pbi as pbi
from mtljax.methods._pcd import pcd as pcd
from mtljax.methods._pcgrad import pcgrad as pcgrad
from mtljax.methods._random_gradient_weighting import (
    random_gradient_weighting as random_gradient_weighting,
)
from mtljax.methods._random_loss_weighting import (
    random_loss_weighting as random_loss_weighting,
)
from mtljax.methods._registry import METHODS as METHODS
from mtljax.methods._registry import Method as Method
from mtljax.methods._registry import find_row as find_row
from mtljax.methods._registry import get_method as get_method
from mtljax.methods._registry import methods_table as methods_table
from mtljax.methods._registry import source_link as source_link
from mtljax.methods._scale_invariant import scale_invariant as scale_invariant
from mtljax.methods._sdmgrad import sdmgrad as sdmgrad
from mtljax.methods._stch import stch as stch
from mtljax.methods._trimmed_mean import trimmed_mean as trimmed_mean
from mtljax.methods._uncertainty import uncertainty as uncertainty
from mtljax.methods._upgrad import upgrad as upgrad
