"""The yardstick of bench.py: the specification's own stack, as its document describes it.

FastAPI, SQLModel, psycopg2, python-jose, synchronous handlers; the document's `app/` tree
(config, models, schemas, database, dependencies, router, main) folded into one file in that order.
Served as such a project is: `uvicorn todo_tests.yardstick_spec:app`, with uvloop and httptools.
"""

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Annotated

from fastapi import APIRouter, Depends, FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from jose import JWTError, jwt
from pydantic_settings import BaseSettings
from sqlalchemy import Index
from sqlmodel import Field, Session, SQLModel, create_engine, select


# config.py
class Settings(BaseSettings):
    neon_db_url: str
    better_auth_secret: str
    better_auth_url: str
    allowed_origins: str = "http://localhost:3000,http://127.0.0.1:3000"


settings = Settings()


def utc_now() -> datetime:
    return datetime.now(UTC)


# models.py
class Task(SQLModel, table=True):
    __tablename__ = "tasks"
    __table_args__ = (Index("ix_tasks_user_id_completed", "user_id", "completed"),)

    id: int | None = Field(default=None, primary_key=True)
    user_id: str = Field(max_length=255, index=True)
    title: str = Field(max_length=200)
    description: str | None = None
    completed: bool = False
    created_at: datetime = Field(default_factory=utc_now)
    updated_at: datetime = Field(default_factory=utc_now)


# schemas.py
class TaskCreate(SQLModel):
    title: str = Field(min_length=1, max_length=200)
    description: str | None = Field(default=None, max_length=1000)


class TaskUpdate(TaskCreate):
    completed: bool | None = None


class TaskRead(SQLModel):
    id: int
    user_id: str
    title: str
    description: str | None
    completed: bool
    created_at: datetime
    updated_at: datetime


# database.py
# More connections than bench.py has: with SQLAlchemy's default of 15 this stack locks up at 100
# concurrent requests, because a request that holds a connection still needs one of FastAPI's 40
# threads to write its answer, and all of them may be waiting for a connection.
engine = create_engine(
    settings.neon_db_url.replace("postgresql:", "postgresql+psycopg2:", 1), pool_size=100
)


def get_session() -> Iterator[Session]:
    with Session(engine) as session:
        yield session


# dependencies.py
bearer = HTTPBearer(auto_error=False)


def get_current_user(
    user_id: str,
    credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)],
) -> str:
    if credentials is None:
        raise HTTPException(401, "Authentication required. Please provide a valid JWT token.")
    try:
        claims = jwt.decode(
            credentials.credentials, settings.better_auth_secret, algorithms=["HS256"]
        )
    except JWTError:
        raise HTTPException(401, "Invalid or expired authentication token.") from None
    current_user = claims.get("sub") or claims.get("user_id")
    if not current_user:
        raise HTTPException(401, "Invalid or expired authentication token.")
    if current_user != user_id:
        raise HTTPException(403, "You do not have permission to access this resource.")
    return current_user


SessionDep = Annotated[Session, Depends(get_session)]
CurrentUser = Annotated[str, Depends(get_current_user)]


# routers/tasks.py
router = APIRouter(prefix="/api/{user_id}/tasks")


def get_own_task(task_id: int, user: CurrentUser, session: SessionDep) -> Task:
    task = session.get(Task, task_id)
    if task is None:
        raise HTTPException(404, "Task not found.")
    if task.user_id != user:
        raise HTTPException(403, "You do not have permission to access this resource.")
    return task


OwnTask = Annotated[Task, Depends(get_own_task)]


def save(session: Session, task: Task) -> Task:
    session.add(task)
    session.commit()
    session.refresh(task)
    return task


@router.get("", response_model=list[TaskRead])
def list_tasks(user: CurrentUser, session: SessionDep):
    return session.exec(select(Task).where(Task.user_id == user)).all()


@router.post("", response_model=TaskRead, status_code=201)
def create_task(body: TaskCreate, user: CurrentUser, session: SessionDep):
    return save(session, Task.model_validate(body, update={"user_id": user}))


@router.get("/{task_id}", response_model=TaskRead)
def get_task(task: OwnTask):
    return task


@router.put("/{task_id}", response_model=TaskRead)
def update_task(body: TaskUpdate, task: OwnTask, session: SessionDep):
    task.sqlmodel_update(body.model_dump(exclude_unset=True))
    task.updated_at = utc_now()
    return save(session, task)


@router.delete("/{task_id}", status_code=204)
def delete_task(task: OwnTask, session: SessionDep) -> None:
    session.delete(task)
    session.commit()


@router.patch("/{task_id}/complete", response_model=TaskRead)
def toggle_task(task: OwnTask, session: SessionDep):
    task.completed = not task.completed
    task.updated_at = utc_now()
    return save(session, task)


# main.py
@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    SQLModel.metadata.create_all(engine)
    yield


app = FastAPI(lifespan=lifespan)
app.add_middleware(
    CORSMiddleware,
    allow_origins=settings.allowed_origins.split(","),
    allow_credentials=True,
    allow_methods=["*"],
    allow_headers=["*"],
)
app.include_router(router)


@app.exception_handler(RequestValidationError)
def validation_error(_: Request, error: RequestValidationError) -> JSONResponse:
    fields = {str(e["loc"][-1]): [e["msg"]] for e in error.errors()}
    return JSONResponse({"detail": "Validation error", "field_errors": fields}, 422)


@app.get("/healthz")
def health() -> dict[str, str]:
    return {"status": "ok"}
