"""Do packed products of experts give the same bits each time, all of them written?"""
import json, os, sys, multiprocessing, itertools
sys.path.insert(0,os.getcwd()); sys.path.insert(0,os.path.join(os.getcwd(),"benchmarks"))
from dataclasses import replace
import torch, tune_kernels as T
from radeon_stack.kernels.configs import TILES, Tile
t=lambda m,n,k,w,s,tail=32,**o:Tile(m,n,k,w,s,tail=tail,turned=True,**o)
BAD=[t(128,64,64,4,3),t(128,128,64,8,4,registers=128),t(128,128,64,8,3),t(128,128,64,8,3,registers=128)]
BEST={"gated_forward":t(256,64,64,8,3),"forward":t(256,128,64,8,3),"gate_apart":t(256,128,64,8,3),"backward":t(256,128,64,8,3)}
WIDE={"gated_forward":t(128,128,64,8,3),"forward":t(128,256,64,8,3),"gate_apart":t(128,256,64,8,3),"backward":t(128,256,64,8,3)}
def plan():
    for tokens,block in ((2048,288),(4096,384)):
        for kind in ("gated_forward","forward","gate_apart","backward"):
            which="backward" if kind=="gate_apart" else kind
            tl=[TILES["cuda",True,which][T.row_block(block,TILES["cuda",True,which])],WIDE[kind]]
            if kind in("gate_apart","backward"): tl+=BAD
            if tokens==4096:
                b=BEST[kind]; tl+=[replace(b,group=g) for g in (1,2,4,16)]+[replace(b,stages=4),replace(b,stages=2)]+[b]
                if kind=="gate_apart": tl+=[t(256,256,64,8,3)] if 0 else []
            else: tl+=[replace(WIDE[kind],group=g) for g in (2,16)]
            for x in dict.fromkeys(tl): yield tokens,kind,x
    yield 128,"gated_backward",TILES["cuda",True,"gated_backward"][16]
    yield 512,"gated_backward",TILES["cuda",True,"gated_backward"][64]
    yield 1024,"gated_backward",TILES["cuda",True,"gated_backward"][96]
    for tokens,b in ((128,16),(256,32),(512,64),(1024,96)):
        for kind in ("gated_forward","forward","backward"): yield tokens,kind,TILES["cuda",True,kind][b]
def compile_(share):
    e=T.Experts(8); e.batch(8,8)
    for _,kind,tile in share:
        try: e.call(kind,True,tile); torch.cuda.synchronize()
        except Exception as x: print("compile",kind,tile,str(x)[:60])
def outs(o): return [o] if torch.is_tensor(o) else [x for x in o if x.numel()]
if __name__=="__main__":
    P=list(plan()); W=16; print(len(P),"to look at",flush=True)
    c=multiprocessing.get_context("spawn"); ws=[c.Process(target=compile_,args=(P[i::W],)) for i in range(W)]
    [w.start() for w in ws]; [w.join() for w in ws]
    e=T.Experts(128); last=None; base={}; rec=[]
    for tokens,kind,tile in P:
        if tokens!=last: e.batch(tokens,128); last=tokens; base={}
        try:
            secs=T.device_seconds(lambda:e.call(kind,True,tile))
            ref=base.setdefault(kind,[o.clone() for o in outs(e.call(kind,True,tile))])
            wrong=0; nan=0; where=None
            for i in range(40):
                o=outs(e.call(kind,True,tile)); 
                for x in o: x.fill_(float("nan"))
                del o,x
                o=outs(e.call(kind,True,tile))
                bad=[(a!=b) for a,b in zip(o,ref) if a.shape==b.shape]
                if any(b.any().item() for b in bad):
                    wrong+=1; nan+=int(any(x.isnan().any().item() for x in o))
                    if where is None:
                        b=next(b for b in bad if b.any().item()); r,cc=b.nonzero(as_tuple=True)
                        where=[int(b.sum()),int(r.min()),int(r.max()),len(r.unique()),int(cc.min()),int(cc.max()),len(cc.unique())]
                        pos=torch.empty_like(e.routing.slots); pos[e.routing.slots.long()]=torch.arange(pos.numel(),device=pos.device,dtype=pos.dtype)
                        p=pos[r.unique()[:8]].long(); off=e.routing.offsets; ex=torch.searchsorted(off,p.int(),right=True)-1
                        where.append([(int(a),int(b-off[a]),int(off[a+1]-off[a])) for a,b in zip(ex,p)])
                del o,bad
            rec.append((tokens,kind,str(tile),secs,wrong,nan,where))
            g=tile; print(f"{tokens} {kind:14s} m{g.m} n{g.n} k{g.k} w{g.warps} s{g.stages} g{g.group} tail{g.tail} r{g.registers}: {1e3*secs:.4f} ms, wrong {wrong} nan {nan} {where}",flush=True)
        except Exception as x:
            torch.cuda.synchronize(); print(tokens,kind,tile,"ERR",str(x)[:100],flush=True)
    json.dump(rec,open(os.environ["OUT"]+"/race.json","w"))
